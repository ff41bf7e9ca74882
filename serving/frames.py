"""What travels between a gateway and a replica on one connection: frames, after a handshake.

Takes bytes as they arrive; gives whole messages, and the other way round. A frame is four bytes of
length, most significant first, and a msgpack list of messages. It does not open connections.

The handshake proves to each side that the other knows the replica's secret, which never travels:
the server says `Hello` with a nonce, the client answers with one of its own and an HMAC over both,
and the server with an HMAC for its side.
"""

import hmac
import secrets
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import msgspec

from serving.messages import (
    Embedded,
    EmbeddingRequest,
    Event,
    InferenceRequest,
    Message,
    Refused,
)

MAX_FRAME_BYTES = 64 * 2**20
MAX_HANDSHAKE_BYTES = 1024
NONCE_BYTES = 32
_LENGTH_BYTES = 4


class Hello(Message, frozen=True):
    """The server's first frame."""

    nonce: bytes


class Proof(Message, frozen=True):
    """The client's first frame."""

    nonce: bytes
    mac: bytes


class Welcome(Message, frozen=True):
    """The server's second frame; requests may follow."""

    mac: bytes


class Submit(Message, frozen=True):
    """Generate; `number` names the request on its connection."""

    number: int
    request: InferenceRequest


class Embed(Message, frozen=True):
    """Embed."""

    number: int
    request: EmbeddingRequest


class Cancel(Message, frozen=True):
    """Stop working for a request; nothing more is said about it."""

    number: int


class Happened(Message, frozen=True):
    """Events of one request; several choices' and several tokens' at a time."""

    number: int
    events: list[Event]


class Ended(Message, frozen=True):
    """All events of this request were said."""

    number: int


class Answered(Message, frozen=True):
    """The result of an embedding request."""

    number: int
    answer: Embedded | Refused


class Declined(Message, frozen=True):
    """The replica stops soon and did not begin this request: ask another one."""

    number: int


class Draining(Message, frozen=True):
    """The replica stops soon: it finishes what it has and begins nothing new."""


Ask = Submit | Embed | Cancel
Answer = Happened | Ended | Answered | Declined | Draining

_encoder = msgspec.msgpack.Encoder()
ask_decoder = msgspec.msgpack.Decoder(list[Ask])
answer_decoder = msgspec.msgpack.Decoder(list[Answer])
_handshake_decoder = msgspec.msgpack.Decoder(Hello | Proof | Welcome)


class ProtocolError(Exception):
    """The other side sent something that is no frame of this protocol; the connection ends."""


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.max_bytes = MAX_HANDSHAKE_BYTES

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that are whole now. Raises ProtocolError for one over the limit."""
        self._buffer += data
        payloads = []
        start, end = 0, len(self._buffer)
        while end - start >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + _LENGTH_BYTES], "big")
            if length > self.max_bytes:
                raise ProtocolError(f"a frame of {length} bytes; at most {self.max_bytes}")
            if end - start - _LENGTH_BYTES < length:
                break
            start += _LENGTH_BYTES
            payloads.append(bytes(self._buffer[start : start + length]))
            start += length
        del self._buffer[:start]
        return payloads


def pack(messages: Sequence[Message]) -> bytes:
    """Return the messages as one frame, or as several where one would be too large."""
    payload = _encoder.encode(messages)
    if len(payload) <= MAX_FRAME_BYTES:
        return _frame(payload)
    assert len(messages) > 1, f"a message of {len(payload)} bytes; the gateway bounds them"
    half = len(messages) // 2
    return pack(messages[:half]) + pack(messages[half:])


def unpack(decoder: msgspec.msgpack.Decoder[Any], payload: bytes) -> Any:
    """Return what a payload says. Raises ProtocolError if it is nothing that `decoder` knows."""
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message: {error}") from error


class ServerHandshake:
    """A replica's side: says Hello, checks a Proof, says Welcome."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._nonce = secrets.token_bytes(NONCE_BYTES)

    def hello(self) -> bytes:
        """Return the frame to begin with."""
        return _frame(_encoder.encode(Hello(self._nonce)))

    def answer(self, payload: bytes) -> bytes:
        """Return the frame that ends the handshake. Raises ProtocolError for a wrong proof."""
        proof = unpack(_handshake_decoder, payload)
        if not isinstance(proof, Proof) or len(proof.nonce) != NONCE_BYTES:
            raise ProtocolError("expected a proof")
        if not hmac.compare_digest(proof.mac, _mac(self._secret, b"c", self._nonce, proof.nonce)):
            raise ProtocolError("a wrong proof")
        mac = _mac(self._secret, b"s", self._nonce, proof.nonce)
        return _frame(_encoder.encode(Welcome(mac)))


class ClientHandshake:
    """A gateway's side: answers Hello with a Proof, checks the Welcome."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._server_nonce: bytes | None = None

    def answer(self, payload: bytes) -> bytes | None:
        """Return the frame to send, or None once the replica proved itself.

        Raises ProtocolError if it did not.
        """
        message = unpack(_handshake_decoder, payload)
        if self._server_nonce is None:
            if not isinstance(message, Hello):
                raise ProtocolError("expected a greeting")
            self._server_nonce = message.nonce
            mac = _mac(self._secret, b"c", message.nonce, self._nonce)
            return _frame(_encoder.encode(Proof(self._nonce, mac)))
        expected = _mac(self._secret, b"s", self._server_nonce, self._nonce)
        if not isinstance(message, Welcome) or not hmac.compare_digest(message.mac, expected):
            raise ProtocolError("the replica does not know its secret")
        return None


def _frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


def _mac(secret: bytes, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(secret, side + server_nonce + client_nonce, sha256)

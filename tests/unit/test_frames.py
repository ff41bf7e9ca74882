import pytest

from serving.engines._protocol import Alternative, FinishReason, GrammarKind, TokenLogprob
from serving.frames import (
    Answered,
    Cancel,
    ClientHandshake,
    Embed,
    Ended,
    Frames,
    Happened,
    ProtocolError,
    ServerHandshake,
    Submit,
    answer_decoder,
    ask_decoder,
    pack,
    unpack,
)
from serving.messages import (
    ChatPrompt,
    Delta,
    Embedded,
    EmbeddingRequest,
    InferenceRequest,
    Refused,
    Sampling,
    Started,
    Structure,
    TextPrompt,
    TokenPrompt,
    Turn,
)


def payloads(data: bytes, piece: int) -> list[bytes]:
    """Feed data in pieces and return the payloads."""
    frames = Frames()
    frames.max_bytes = 2**20
    return [
        payload
        for start in range(0, len(data), piece)
        for payload in frames.feed(data[start : start + piece])
    ]


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_frames_when_cut_anywhere_come_out_whole(piece: int):
    asks = [[Cancel(1)], [Cancel(2), Cancel(3)], [Cancel(4)]]
    data = b"".join(map(pack, asks))
    assert [unpack(ask_decoder, payload) for payload in payloads(data, piece)] == asks


def test_frames_when_one_is_too_large_are_refused():
    frames = Frames()
    with pytest.raises(ProtocolError, match="at most"):
        frames.feed((2**20).to_bytes(4, "big"))


def test_asks_when_packed_and_unpacked_are_equal():
    sampling = Sampling(
        max_tokens=5,
        logit_bias={3: -1.5},
        structure=Structure(GrammarKind.REGEX, "a+"),
        stop=("x",),
        seed=-7,
    )
    chat = ChatPrompt((Turn("user", "hi"), Turn("tool", None, tool_call_id="1")), tools="[]")
    prompts = (TextPrompt("é"), TokenPrompt((1, 2)), chat)
    request = InferenceRequest(prompts, sampling, 2, "id", "team", "lora", ((1,), ()) * 3, (4,))
    asks = [Submit(1, request), Embed(2, EmbeddingRequest((TokenPrompt((1,)),), 3)), Cancel(1)]
    (payload,) = payloads(pack(asks), 4096)
    assert unpack(ask_decoder, payload) == asks


def test_answers_when_packed_and_unpacked_are_equal():
    logprob = TokenLogprob(5, "a", -0.5, (Alternative(6, "b", -1.0),))
    delta = Delta(0, "a", (5,), FinishReason.STOP, (logprob,), 7)
    answers = [
        Happened(1, [Started(3), delta, Refused(503, "gone", retry_after_s=1)]),
        Ended(1),
        Answered(2, Embedded(((0.5, 0.5),), 3)),
        Answered(3, Refused(400, "wrong")),
    ]
    (payload,) = payloads(pack(answers), 4096)
    assert unpack(answer_decoder, payload) == answers


def test_unpack_when_bytes_are_no_message_is_refused():
    for payload in (b"", b"\xc1", b"\x91\x80", b"\x80"):
        with pytest.raises(ProtocolError):
            unpack(ask_decoder, payload)


def shake(server: ServerHandshake, client: ClientHandshake) -> bytes | None:
    (hello,) = payloads(server.hello(), 99)
    (proof,) = payloads(client.answer(hello), 99)
    (welcome,) = payloads(server.answer(proof), 99)
    return client.answer(welcome)


def test_handshake_when_both_know_the_secret_succeeds():
    assert shake(ServerHandshake(b"secret"), ClientHandshake(b"secret")) is None


def test_handshake_when_the_client_does_not_know_the_secret_is_refused():
    with pytest.raises(ProtocolError, match="a wrong proof"):
        shake(ServerHandshake(b"secret"), ClientHandshake(b"other"))


def test_handshake_when_the_server_only_reflects_is_refused():
    client = ClientHandshake(b"secret")
    (hello,) = payloads(ServerHandshake(b"other").hello(), 99)
    (proof,) = payloads(client.answer(hello), 99)
    with pytest.raises(ProtocolError, match="does not know its secret"):
        client.answer(proof)

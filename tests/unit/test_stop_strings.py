from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engines.native.detokenizer import Detokenizer


class ByteDecoder:
    """Every token is one byte, so that any character outside ASCII takes several tokens."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


class WordDecoder:
    """Words are joined by spaces, and the first has none before it, as SentencePiece does."""

    words = ("the", "cat", "sat")

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[token] for token in token_ids)


def run(text: str | bytes, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    """Return the piece given out after each token and at the end, and whether a stop was met."""
    data = text.encode() if isinstance(text, str) else text
    detokenizer = Detokenizer(ByteDecoder(), stop=stop)
    pieces = []
    for token in data:
        pieces.append(detokenizer.push(token))
        if detokenizer.is_stopped:
            return pieces, True
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.is_stopped


def test_push_when_character_is_incomplete_holds_it_back():
    assert run("a€b")[0] == ["a", "", "", "€", "b", ""]


def test_finish_when_character_is_incomplete_gives_a_replacement():
    assert run("a€".encode()[:-1])[0] == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_push_when_bytes_are_never_text_does_not_hold_them_forever():
    assert run(b"\xff" * 40)[0][31] == "\N{REPLACEMENT CHARACTER}" * 32


def test_push_when_decoder_needs_context_keeps_the_space_after_the_prompt():
    detokenizer = Detokenizer(WordDecoder(), prompt_tokens=[0])
    assert [detokenizer.push(1), detokenizer.push(2)] == [" cat", " sat"]


def test_push_when_there_is_no_decoder_gives_no_text():
    detokenizer = Detokenizer(None)
    assert detokenizer.push(3) + detokenizer.finish() == ""


def test_push_when_stop_is_met_cuts_before_it():
    pieces, is_stopped = run("one\n\ntwo", ["\n\n"])
    assert ("".join(pieces), is_stopped) == ("one", True)


def test_push_when_stop_only_begins_gives_it_out_later():
    assert run("a\nb", ["\n\n"])[0] == ["a", "", "\nb", ""]


def test_finish_when_stop_only_began_gives_it_out():
    pieces, is_stopped = run("a\n", ["\n\n"])
    assert ("".join(pieces), is_stopped) == ("a\n", False)


def test_push_when_several_stops_match_cuts_at_the_earliest():
    pieces, _ = run("abcdef", ["def", "cde"])
    assert "".join(pieces) == "ab"


def test_push_when_stop_overlaps_itself_is_not_missed():
    assert "".join(run("aaab", ["aab"])[0]) == "a"


@pytest.mark.parametrize("stop", ["€", "x€y"])
def test_push_when_stop_is_not_ascii_is_found(stop):
    assert "".join(run(f"ab{stop}cd", [stop])[0]) == "ab"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab€\n", max_size=30),
    stop=st.lists(st.text(alphabet="ab€\n", min_size=1, max_size=4), max_size=4),
)
def test_push_for_any_text_equals_cutting_the_whole(text, stop):
    # The first stop string that is complete ends the text, where the earliest complete one begins.
    ends = [text.find(each) + len(each) for each in stop if each in text]
    seen = text[: min(ends, default=len(text))]
    expected = text[: min((seen.find(each) for each in stop if each in seen), default=len(text))]
    assert "".join(run(text, stop)[0]) == expected


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab€\n", max_size=20),
    stop=st.lists(st.text(alphabet="ab€\n", min_size=1, max_size=4), max_size=2),
    share=st.floats(0, 1),
)
def test_push_when_resumed_anywhere_goes_on_as_if_never_stopped(text, stop, share):
    data = text.encode()
    num_resumed = int(share * len(data))
    pieces, is_stopped = run(data, stop)
    resumed = Detokenizer(ByteDecoder(), stop=stop, resumed_tokens=list(data[:num_resumed]))
    rest = []
    for token in data[num_resumed:]:
        if not resumed.is_stopped:
            rest.append(resumed.push(token))
    if not resumed.is_stopped:
        rest.append(resumed.finish())
    assert (rest, resumed.is_stopped) == (pieces[num_resumed:], is_stopped)


def test_push_when_resumed_after_a_stop_string_is_stopped_at_once():
    assert Detokenizer(ByteDecoder(), stop=["b"], resumed_tokens=list(b"abc")).is_stopped

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engines._protocol import GenerateRequest
from serving.engines.native.detokenizer import Detokenizer
from serving.engines.native.scheduler import Scheduler
from serving.engines.native.sequence import Sequence, State


def sequence(num_prompt: int, max_tokens: int = 4) -> Sequence:
    request = GenerateRequest(prompt_tokens=tuple(range(num_prompt)))
    return Sequence(request, max_tokens, Detokenizer(None), lambda item: None)


def scheduler_with(sequences: list[Sequence], slots: int = 4, tokens: int = 8) -> Scheduler:
    scheduler = Scheduler(slots, tokens)
    for each in sequences:
        scheduler.add(each)
    return scheduler


def advance(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """Carry out one pass as the engine does; return what ran."""
    pieces = scheduler.schedule()
    for piece in pieces:
        piece.sequence.num_cached += piece.length
    for piece in pieces:
        if piece.is_last:
            piece.sequence.tokens.append(0)
            if piece.sequence.num_generated == piece.sequence.max_tokens:
                scheduler.finish(piece.sequence)
    return [(piece.sequence, piece.start, piece.length) for piece in pieces]


def test_schedule_when_nothing_waits_returns_nothing():
    assert Scheduler(2, 8).schedule() == []


def test_schedule_when_prompt_exceeds_budget_splits_it():
    long = sequence(20)
    scheduler = scheduler_with([long])
    assert [advance(scheduler) for _ in range(4)] == [
        [(long, 0, 8)],
        [(long, 8, 8)],
        [(long, 16, 4)],
        [(long, 20, 1)],
    ]


def test_schedule_when_prompt_is_split_samples_only_after_its_last_piece():
    scheduler = scheduler_with([sequence(10)])
    assert [piece.is_last for piece in scheduler.schedule()] == [False]


def test_schedule_when_a_sequence_decodes_lets_no_prompt_delay_it():
    first, long = sequence(2), sequence(30)
    scheduler = scheduler_with([first])
    advance(scheduler)
    scheduler.add(long)
    assert advance(scheduler) == [(first, 2, 1), (long, 0, 7)]
    assert advance(scheduler) == [(first, 3, 1), (long, 7, 7)]


def test_schedule_when_two_prompts_fit_runs_both_in_one_pass():
    first, second = sequence(3), sequence(4)
    assert advance(scheduler_with([first, second])) == [(first, 0, 3), (second, 0, 4)]


def test_schedule_when_slots_are_taken_keeps_arrival_order():
    sequences = [sequence(2, max_tokens=1), sequence(2, max_tokens=2), sequence(2), sequence(2)]
    scheduler = scheduler_with(sequences, slots=2)
    assert [each for each, _, _ in advance(scheduler)] == sequences[:2]
    assert scheduler.num_waiting == 2
    assert [each for each, _, _ in advance(scheduler)] == [sequences[1], sequences[2]]


def test_finish_when_called_gives_the_lowest_slot_to_the_next():
    sequences = [sequence(1, max_tokens=1), sequence(1), sequence(1)]
    scheduler = scheduler_with(sequences, slots=2)
    advance(scheduler)
    advance(scheduler)
    assert sequences[2].slot == 0
    assert sequences[0].state is State.FINISHED


@pytest.mark.parametrize("num_passes", [0, 1, 2])
def test_cancel_when_waiting_or_running_frees_everything(num_passes):
    each = sequence(10)
    scheduler = scheduler_with([each], slots=1)
    for _ in range(num_passes):
        advance(scheduler)
    scheduler.cancel(each)
    assert each.state is State.CANCELLED
    assert scheduler.is_idle
    assert scheduler.num_free_slots == 1


def test_cancel_when_finished_changes_nothing():
    each = sequence(1, max_tokens=1)
    scheduler = scheduler_with([each])
    advance(scheduler)
    scheduler.cancel(each)
    assert each.state is State.FINISHED


def test_move_when_impossible_is_a_bug():
    with pytest.raises(AssertionError, match="cannot go from"):
        sequence(1).move(State.FINISHED)


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=12),
    slots=st.integers(1, 5),
    spare_tokens=st.integers(0, 10),
)
def test_schedule_for_any_load_finishes_all_within_the_budget(prompts, slots, spare_tokens):
    sequences = [sequence(num_prompt, max_tokens) for num_prompt, max_tokens in prompts]
    scheduler = scheduler_with(sequences, slots, slots + spare_tokens)
    while not scheduler.is_idle:
        ran = advance(scheduler)
        assert ran, "a pass without work would never end"
        assert sum(length for _, _, length in ran) <= slots + spare_tokens
        assert len(ran) <= slots
    assert all(each.state is State.FINISHED for each in sequences)
    assert scheduler.num_free_slots == slots

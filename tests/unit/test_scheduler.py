import pytest
from engine_fakes import advance, run_all, scheduler_with, sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engines.native.blocks import BlockManager
from serving.engines.native.sequence import State


def test_schedule_when_nothing_waits_returns_nothing():
    assert scheduler_with([]).schedule() == []


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


def test_finish_when_called_gives_slot_and_blocks_to_the_next():
    sequences = [sequence(1, max_tokens=1), sequence(1), sequence(1)]
    scheduler = scheduler_with(sequences, slots=2)
    advance(scheduler)
    assert sequences[0].state is State.FINISHED
    assert (sequences[0].blocks, scheduler.num_free_slots) == ([], 1)
    advance(scheduler)
    assert sequences[2].state is State.RUNNING


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
    assert scheduler.blocks.num_used == 0


def test_cancel_when_finished_changes_nothing():
    each = sequence(1, max_tokens=1)
    scheduler = scheduler_with([each])
    advance(scheduler)
    scheduler.cancel(each)
    assert each.state is State.FINISHED


def test_move_when_impossible_is_a_bug():
    with pytest.raises(AssertionError, match="cannot go from"):
        sequence(1).move(State.FINISHED)


def test_schedule_when_blocks_run_out_recomputes_the_last_admitted():
    first, second = sequence(4, max_tokens=8), sequence(4, max_tokens=8)
    scheduler = scheduler_with([first, second], blocks=BlockManager(4, 4))
    while scheduler.num_preemptions == 0:
        advance(scheduler)
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)
    assert (second.blocks, second.num_generated > 0) == ([], True)
    run_all(scheduler)
    assert [each.num_generated for each in (first, second)] == [8, 8]
    assert scheduler.blocks.num_used == 0


def test_schedule_when_blocks_run_out_takes_them_from_the_tenant_with_most():
    small = sequence(4, max_tokens=12, tenant="small")
    large = [sequence(4, max_tokens=12, tenant="large") for _ in range(2)]
    scheduler = scheduler_with([*large, small], blocks=BlockManager(7, 4))
    while scheduler.num_preemptions == 0:
        advance(scheduler)
    assert small.state is State.RUNNING
    assert [each.state for each in large] == [State.RUNNING, State.WAITING]


def test_schedule_when_a_prompt_was_computed_before_starts_behind_it():
    shared = tuple(range(10))
    first = sequence(0, max_tokens=1, prompt_tokens=shared)
    scheduler = scheduler_with([first], tokens=64)
    run_all(scheduler)
    second = sequence(0, prompt_tokens=shared)
    scheduler.add(second)
    assert advance(scheduler) == [(second, 8, 2)]
    assert second.num_reused == 8


def test_schedule_when_a_prompt_is_being_computed_waits_to_take_it():
    shared = tuple(range(9))
    first, second = (sequence(0, prompt_tokens=shared) for _ in range(2))
    scheduler = scheduler_with([first, second], tokens=64)
    assert advance(scheduler) == [(first, 0, 9)]
    assert advance(scheduler) == [(first, 9, 1), (second, 8, 1)]


def test_schedule_when_the_one_that_computes_a_prompt_leaves_lets_the_next_do_it():
    shared = tuple(range(30))
    first, second = (sequence(0, prompt_tokens=shared) for _ in range(2))
    scheduler = scheduler_with([first, second], tokens=8)
    assert advance(scheduler) == [(first, 0, 8)]
    scheduler.cancel(first)
    assert advance(scheduler) == [(second, 8, 8)]


def test_schedule_when_tenants_compete_for_slots_takes_the_least_served():
    many = [sequence(4, max_tokens=1, tenant="many") for _ in range(6)]
    few = sequence(4, max_tokens=1, tenant="few")
    scheduler = scheduler_with([*many, few], slots=1)
    order = [advance(scheduler)[0][0] for _ in range(3)]
    assert order[:2] in ([many[0], few], [few, many[0]])


def test_schedule_when_one_tenant_has_all_slots_gives_another_its_share():
    many = [sequence(2, max_tokens=50, tenant="many") for _ in range(8)]
    scheduler = scheduler_with(many, slots=4, tokens=32)
    advance(scheduler)
    few = [sequence(2, max_tokens=50, tenant="few") for _ in range(4)]
    for each in few:
        scheduler.add(each)
    advance(scheduler)
    running = [each for each in (*many, *few) if each.state is State.RUNNING]
    assert running == [*many[:2], *few[:2]]
    advance(scheduler)
    assert scheduler.num_preemptions == 2, "once each has its share nothing is moved"


def test_schedule_when_a_tenant_is_light_holds_the_heavy_one_back():
    many = [sequence(2, max_tokens=90, tenant="many") for _ in range(6)]
    scheduler = scheduler_with(many, slots=8, tokens=32, max_shared_tokens=2)
    advance(scheduler)
    few = sequence(20, tenant="few")
    scheduler.add(few)
    ran = advance(scheduler)
    assert (few, 0, 20) in ran
    assert len(ran) == 1 + 3
    turns = [each for _ in range(2) for each, _, _ in advance(scheduler) if each is not few]
    assert set(turns) | {each for each, _, _ in ran} >= set(many), "all get their turn"


def test_schedule_when_guesses_are_allowed_leaves_room_for_them_up_to_the_end():
    first, second = sequence(2, 3, drafts=6), sequence(2, 90, drafts=6)
    scheduler = scheduler_with([first, second], slots=2, tokens=16, max_draft_rows=8)
    assert [piece.max_drafts for piece in scheduler.schedule()] == [2, 2]
    assert all(len(each.blocks) == 1 for each in (first, second))


def test_schedule_when_a_pass_is_full_allows_no_guesses():
    scheduler = scheduler_with([sequence(8, 90, drafts=6)], max_draft_rows=8)
    assert [piece.max_drafts for piece in scheduler.schedule()] == [0]


def test_queue_age_when_sequences_wait_is_that_of_the_oldest():
    scheduler = scheduler_with([sequence(2), sequence(2)], slots=1)
    scheduler._clock.now_s += 2.0
    scheduler.add(sequence(2, tenant="other"))
    advance(scheduler)
    assert scheduler.queue_age_s == 2.0
    run_all(scheduler)
    scheduler.schedule()
    assert scheduler.queue_age_s == 0.0


def test_queue_age_when_all_are_cancelled_between_passes_is_none():
    running, waiting = sequence(2), sequence(2)
    scheduler = scheduler_with([running, waiting], slots=1)
    advance(scheduler)
    scheduler.cancel(running)
    scheduler.cancel(waiting)
    scheduler._clock.now_s += 60.0
    assert scheduler.is_idle
    assert scheduler.queue_age_s == 0.0


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 6), st.sampled_from("abc")),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 5),
    spare_tokens=st.integers(0, 10),
    num_blocks=st.integers(12, 40),
    shared=st.sampled_from([None, 1, 4]),
)
def test_schedule_for_any_load_finishes_all_within_the_budget(
    prompts, slots, spare_tokens, num_blocks, shared
):
    sequences = [
        sequence(0, max_tokens, prompt_tokens=tuple(range(num_prompt)), tenant=tenant)
        for num_prompt, max_tokens, tenant in prompts
    ]
    blocks = BlockManager(num_blocks, 4)
    scheduler = scheduler_with(
        sequences, slots, slots + spare_tokens, blocks, max_shared_tokens=shared
    )
    for _ in range(10_000):
        if scheduler.is_idle:
            break
        ran = advance(scheduler)
        assert ran, "a pass without work would never end"
        assert sum(length for _, _, length in ran) <= slots + spare_tokens
        assert len({id(each) for each, _, _ in ran}) == len(ran) <= slots
    assert [each.num_generated for each in sequences] == [
        max_tokens for _, max_tokens, _ in prompts
    ]
    assert all(each.state is State.FINISHED for each in sequences)
    assert (scheduler.num_free_slots, blocks.num_used) == (slots, 0)

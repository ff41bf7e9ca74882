import pytest
from engine_fakes import sequence
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.engines.native.blocks import BlockManager

SHARED = tuple(range(100, 120))


def compute(manager: BlockManager, each) -> None:
    """Have all tokens of a sequence in the cache, as a pass does."""
    each.num_cached = len(each.tokens)
    manager.commit(each)


def computed(manager: BlockManager, **options):
    each = sequence(0, **{"prompt_tokens": SHARED, **options})
    manager.allocate(each)
    compute(manager, each)
    return each


def test_allocate_when_nothing_is_known_takes_free_blocks():
    manager, each = BlockManager(8, 4), sequence(9)
    manager.allocate(each)
    assert (len(set(each.blocks)), each.num_cached, manager.num_free) == (3, 0, 5)


def test_allocate_when_a_beginning_is_known_shares_its_full_blocks():
    manager = BlockManager(16, 4)
    first = computed(manager)
    second = sequence(0, prompt_tokens=(*SHARED[:10], 1, 2))
    manager.allocate(second)
    assert second.blocks[:2] == first.blocks[:2]
    assert (second.num_cached, manager.num_used) == (8, 5 + 1)


def test_allocate_when_a_draft_model_read_less_says_how_much_it_knows():
    manager, first = BlockManager(16, 4), sequence(0, prompt_tokens=SHARED)
    manager.allocate(first)
    first.num_cached, first.drafting.num_draft_cached = 8, 8
    manager.commit(first)
    first.num_cached = 16  # What came after was decoded without guesses.
    manager.commit(first)
    second = sequence(0, prompt_tokens=SHARED)
    manager.allocate(second)
    assert (second.num_cached, second.drafting.num_draft_cached) == (16, 8)


def test_allocate_when_the_whole_prompt_is_known_leaves_its_last_token():
    manager = BlockManager(16, 4)
    computed(manager)
    second = sequence(0, prompt_tokens=SHARED)
    manager.allocate(second)
    assert second.num_cached == 16


@pytest.mark.parametrize("options", [{"tenant": "b"}, {"adapter": "x"}, {"tenant": "x"}])
def test_allocate_when_tenant_or_adapter_differ_shares_nothing(options):
    manager = BlockManager(16, 4)
    first = computed(manager)
    second = sequence(0, prompt_tokens=SHARED, **options)
    manager.allocate(second)
    assert not set(first.blocks) & set(second.blocks)
    assert second.num_cached == 0


def test_allocate_when_prefixes_are_not_kept_shares_nothing():
    manager = BlockManager(16, 4, is_prefix_cached=False)
    computed(manager)
    second = sequence(0, prompt_tokens=SHARED)
    manager.allocate(second)
    assert (second.num_cached, manager.next_key(second)) == (0, None)


def test_allocate_when_one_token_differs_early_shares_nothing_behind_it():
    manager = BlockManager(16, 4)
    computed(manager)
    second = sequence(0, prompt_tokens=(SHARED[0], 1, *SHARED[2:]))
    manager.allocate(second)
    assert second.num_cached == 0


def test_allocate_when_blocks_were_released_finds_them_until_they_are_needed():
    manager = BlockManager(6, 4)
    first = computed(manager)
    kept = list(first.blocks)
    manager.release(first)
    assert manager.num_used == 0
    large = sequence(8)
    manager.allocate(large)  # Takes the free block, and then the end of the chain.
    second = sequence(0, prompt_tokens=SHARED)
    assert manager.can_allocate(second) is False
    manager.release(large)
    manager.allocate(second)
    assert second.blocks[:4] == kept[:4]
    assert second.num_cached == 16


def test_can_allocate_when_found_blocks_are_idle_counts_them_as_taken():
    manager = BlockManager(5, 4)
    manager.release(computed(manager))
    assert manager.num_missing(sequence(0, prompt_tokens=SHARED)) == 5
    assert manager.can_allocate(sequence(0, prompt_tokens=(*SHARED, 1))) is False


def test_release_when_blocks_are_shared_keeps_them_for_the_other():
    manager = BlockManager(16, 4)
    first = computed(manager)
    second = sequence(0, prompt_tokens=SHARED)
    manager.allocate(second)
    assert manager.num_released(first) == 1
    manager.release(first)
    assert manager.num_used == 5


class Usage(RuleBasedStateMachine):
    """Any order of verbs: no block is lost, or shared while it may change."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(10, 2)
        self.held = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), tenant=st.sampled_from("ab"))
    def allocate(self, tokens, tenant):
        each = sequence(0, prompt_tokens=tuple(tokens), tenant=tenant)
        if self.manager.can_allocate(each):
            self.manager.allocate(each)
            self.held.append(each)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), num=st.integers(1, 4))
    def extend(self, data, num):
        each = data.draw(st.sampled_from(self.held))
        if self.manager.can_extend(each, len(each.tokens) + num):
            self.manager.extend(each, len(each.tokens) + num)
            each.tokens.extend([1] * num)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def compute(self, data):
        compute(self.manager, data.draw(st.sampled_from(self.held)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        each = data.draw(st.sampled_from(self.held))
        self.held.remove(each)
        self.manager.release(each)

    @invariant()
    def accounts_for_every_block(self):
        used = {block for each in self.held for block in each.blocks}
        assert self.manager.num_used == len(used)
        assert all(len(set(each.blocks)) == len(each.blocks) for each in self.held)

    @invariant()
    def shares_only_equal_beginnings(self):
        contents = {}
        for each in self.held:
            for place, block in enumerate(each.blocks):
                beginning = (each.tenant, tuple(each.tokens[: 2 * (place + 1)]))
                assert contents.setdefault(block, beginning) == beginning


TestUsage = Usage.TestCase
TestUsage.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

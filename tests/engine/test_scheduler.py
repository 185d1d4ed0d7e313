"""The scheduler against a simulated cache: every response is what the sequence alone would have given."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from support.simulated_cache import VOCAB, Simulation, expected

from rlalign.config import EngineConfig
from rlalign.records import derive_seed


def random_prompt(rng: random.Random, low: int = 1, high: int = 40) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]


@pytest.mark.parametrize("seed", range(40))
def test_any_schedule_gives_each_sequence_its_own_response(seed: int) -> None:
    rng = random.Random(seed)
    page_size = rng.choice([1, 3, 4, 16])
    config = EngineConfig(
        page_size=page_size,
        num_pages=-(-64 // page_size) + rng.randint(0, 60 // page_size),
        max_batch_tokens=rng.choice([1, 7, 30, 500]),
        max_num_seqs=rng.choice([1, 2, 5, 100]),
        prefill_chunk=rng.choice([1, 5, 16, 100]),
        prefix_cache=rng.random() < 0.7,
    )
    stop_ids = frozenset(rng.sample(range(VOCAB), rng.choice([0, 2])))
    simulation = Simulation(config, stop_ids)
    shared = random_prompt(rng, 10, 30)
    wanted = {}
    for number in range(12):
        prompt = shared[: rng.randint(0, len(shared))] + random_prompt(rng, 1, 10)
        max_tokens, n = rng.randint(1, 20), rng.choice([1, 1, 2, 4, 6])
        simulation.add(str(number), prompt, max_tokens=max_tokens, n=n, seed=number)
        for sample in range(n):
            wanted[str(number), sample] = expected(prompt, max_tokens, derive_seed(number, sample), stop_ids)
        for _ in range(rng.randint(0, 3)):  # arrivals interleave with steps
            if simulation.scheduler.has_unfinished:
                simulation.step()
    assert simulation.run() == wanted


def test_many_sequences_share_one_forward_and_prefill_mixes_with_decode() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=200, max_batch_tokens=64))
    for number in range(8):
        simulation.add(str(number), [number] * 5, max_tokens=10)
    for _ in range(3):
        simulation.step()
    simulation.add("late", list(range(20)), max_tokens=2)
    simulation.step()
    assert [len(step.chunks) for step in simulation.steps] == [8, 8, 8, 9]
    assert simulation.scheduler.counters.mixed_steps == 1
    assert simulation.scheduler.counters.max_batch_size == 9


def test_the_peak_counts_pages_that_a_forward_held_and_can_be_restarted() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=50, prefix_cache=False))
    for number in range(3):
        simulation.add(str(number), [number] * 8, max_tokens=2)  # 9 tokens are computed: 3 pages each
    simulation.run()
    scheduler = simulation.scheduler
    assert scheduler.peak_pages == 9 and simulation.scheduler.pool.num_free == 50
    scheduler.peak_pages = 0
    simulation.add("small", [1, 2], max_tokens=1)
    simulation.run()
    assert scheduler.peak_pages == 1


def test_first_come_first_served() -> None:
    simulation = Simulation(EngineConfig(max_num_seqs=2))
    for number in range(6):
        simulation.add(str(number), [1, 2, number], max_tokens=3)
    order = [request.request_id for _ in range(9) for request in simulation.step()]
    assert order == ["0", "1", "2", "3", "4", "5"]


def test_a_prompt_is_prefilled_in_chunks_within_the_budget() -> None:
    simulation = Simulation(EngineConfig(max_batch_tokens=12, prefill_chunk=7, page_size=4, num_pages=50))
    simulation.add("a", list(range(20)), max_tokens=1)
    simulation.add("b", list(range(20, 30)), max_tokens=1)
    simulation.run()
    sizes = [[(c.request.request_id, c.start, c.num_tokens) for c in step.chunks] for step in simulation.steps]
    assert sizes == [
        [("a", 0, 7), ("b", 0, 5)],
        [("a", 7, 7), ("b", 5, 5)],
        [("a", 14, 6)],
    ]


def test_samples_of_one_prompt_share_its_prefill() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=100, prefix_cache=False))
    prompt = list(range(10))
    simulation.add("a", prompt, max_tokens=6, n=5, seed=3)
    finished = simulation.run()
    assert simulation.scheduler.counters.prefill_tokens == len(prompt)
    # Five sequences hold the half-filled page; the last one to write keeps the original.
    assert simulation.scheduler.counters.page_copies == 4
    assert len({tuple(response) for response in finished.values()}) == 5
    assert finished == {("a", j): expected(prompt, 6, derive_seed(3, j)) for j in range(5)}


def test_full_prompt_pages_are_shared_not_copied() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=100, prefix_cache=False))
    simulation.add("a", list(range(8)), max_tokens=6, n=3)
    simulation.step()
    assert simulation.config.num_pages - simulation.pool.num_free == 2
    simulation.step()
    assert simulation.scheduler.counters.page_copies == 0
    assert simulation.config.num_pages - simulation.pool.num_free == 2 + 3


def test_more_samples_than_slots_wait_their_turn() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=100, max_num_seqs=3))
    prompt = list(range(9))
    simulation.add("a", prompt, max_tokens=5, n=8, seed=1)
    simulation.add("b", [7], max_tokens=2)
    finished = simulation.run()
    assert max(len(step.chunks) for step in simulation.steps) == 3
    assert all(finished["a", j] == expected(prompt, 5, derive_seed(1, j)) for j in range(8))


def test_the_latest_arrival_is_preempted_and_recomputed() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=8, prefix_cache=False))
    prompts = [[number] * 12 for number in range(2)]
    for number, prompt in enumerate(prompts):
        simulation.add(str(number), prompt, max_tokens=15)
    while simulation.scheduler.counters.preemptions == 0:
        simulation.step()
    assert [request.request_id for request in simulation.scheduler.waiting] == ["1"]
    assert simulation.scheduler.waiting[0].pages == []
    finished = simulation.run()
    assert simulation.scheduler.counters.prefill_tokens > 24  # the second prompt was computed again
    assert finished == {(str(i), 0): expected(prompts[i], 15, derive_seed(0, 0)) for i in range(2)}


def test_a_preempted_sequence_waits_in_front_of_later_arrivals() -> None:
    config = EngineConfig(page_size=4, num_pages=8, max_num_seqs=2, prefix_cache=False)
    simulation = Simulation(config)
    for number in range(4):
        simulation.add(str(number), [number] * 12, max_tokens=15)
    while simulation.scheduler.counters.preemptions == 0:
        simulation.step()
    assert [request.request_id for request in simulation.scheduler.waiting] == ["1", "2", "3"]


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    """The freed pages are needed by whoever runs: a new prefill would be thrown away a few steps later."""
    simulation = Simulation(EngineConfig(page_size=4, num_pages=8, prefill_chunk=8, prefix_cache=False))
    for number in range(2):
        simulation.add(str(number), [number] * 12, max_tokens=15)
    while simulation.scheduler.counters.preemptions == 0:
        simulation.step()
    assert simulation.pool.num_free >= 2  # room for the first chunk of the preempted one
    assert [chunk.request.request_id for chunk in simulation.steps[-1].chunks] == ["0"]


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=9))
    for number in range(2):
        simulation.add(str(number), [number] * 12, max_tokens=16)
    simulation.run()
    assert simulation.scheduler.counters.preemptions > 0
    assert simulation.scheduler.counters.prefix_hit_tokens > 0


def test_a_known_prefix_is_not_computed_again() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=50))
    prompt = list(range(20))
    simulation.add("a", prompt, max_tokens=3)
    simulation.run()
    before = simulation.scheduler.counters.prefill_tokens
    simulation.add("b", prompt, max_tokens=3, seed=5)
    simulation.add("c", [*prompt[:9], 49, 48], max_tokens=3)
    finished = simulation.run()
    # b: 16 of 20 are known, because its last token must be computed; c: two pages are.
    assert simulation.scheduler.counters.prefill_tokens - before == 4 + 3
    assert simulation.scheduler.counters.prefix_hit_tokens == 16 + 8
    assert finished["b", 0] == expected(prompt, 3, derive_seed(5, 0))


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_abort_returns_every_sample_and_frees_the_pages(num_steps: int) -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=50, prefill_chunk=6))
    simulation.add("a", list(range(10)), max_tokens=30, n=3)
    other = list(range(5))
    simulation.add("b", other, max_tokens=8)
    for _ in range(num_steps):
        simulation.step()
    aborted = simulation.scheduler.abort("a")
    assert [(r.sample_index, r.finish_reason, r.pages) for r in aborted] == [(j, "abort", []) for j in range(3)]
    assert simulation.run() == {("b", 0): expected(other, 8, derive_seed(0, 0))}


def test_length_limits_end_a_response() -> None:
    simulation = Simulation(EngineConfig(page_size=4, num_pages=50))
    by_tokens = simulation.add("a", [1] * 5, max_tokens=4)
    by_length = simulation.add("b", [2] * 5, max_length=8, max_tokens=100)
    finished = simulation.run()
    assert (len(finished["a", 0]), len(finished["b", 0])) == (4, 3)
    assert (by_tokens.finish_reason, by_length.finish_reason) == ("length", "length")


def test_the_scheduler_runs_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rlalign.engine.scheduler, rlalign.engine.stopping"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)

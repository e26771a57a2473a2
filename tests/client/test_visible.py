"""CUDA_VISIBLE_DEVICES and its relatives -> UUIDs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd.errors import RequestError
from powerd.model import Gpu
from powerd.visible import device_minors, pick, visible

U = [f"GPU-{i}{i}{i}{i}aaaa-0000-4000-8000-00000000000{i}" for i in range(8)]
NODE = tuple(Gpu(U[i], i, "A100", f"00000000:{i + 1:02X}:00.0", i) for i in range(8))


def names(*indices: int) -> tuple[str, ...]:
    return tuple(U[i] for i in indices)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, names(*range(8))),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "none"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "3,1"}, names(3, 1)),
        ({"CUDA_VISIBLE_DEVICES": "0,9,1"}, names(0)),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, names(0)),
        ({"CUDA_VISIBLE_DEVICES": "2,2"}, ()),
        ({"CUDA_VISIBLE_DEVICES": f"{U[5]},{U[2][:8]}"}, names(5, 2)),
        ({"CUDA_VISIBLE_DEVICES": f"MIG-{U[4]}/1/0"}, names(4)),
        ({"CUDA_VISIBLE_DEVICES": "4,5", "LOCAL_RANK": "1"}, names(5)),
        ({"CUDA_VISIBLE_DEVICES": "4", "LOCAL_RANK": "3"}, names(4)),
        ({"LOCAL_RANK": "6"}, names(6)),
        # a container that was given GPUs 2 and 3: renumbered from 0, unless the list says the node's own numbers
        ({"NVIDIA_VISIBLE_DEVICES": "2,3"}, names(2, 3)),
        ({"NVIDIA_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "1"}, names(3)),
        ({"NVIDIA_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "2,3"}, names(2, 3)),
        ({"NVIDIA_VISIBLE_DEVICES": f"{U[6]},{U[7]}", "CUDA_VISIBLE_DEVICES": "0"}, names(6)),
        ({"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VISIBLE_DEVICES": "7"}, names(7)),
        ({"NVIDIA_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": U[5]}, ()),
        # Slurm with and without device cgroups
        ({"SLURM_JOB_GPUS": "4,6", "CUDA_VISIBLE_DEVICES": "0,1"}, names(4, 6)),
        ({"SLURM_JOB_GPUS": "4,6", "CUDA_VISIBLE_DEVICES": "4,6"}, names(4, 6)),
        ({"SLURM_JOB_GPUS": "4,6", "SLURM_STEP_GPUS": "6", "CUDA_VISIBLE_DEVICES": "0"}, names(6)),
    ],
)
def test_what_cuda_would_show(env: dict[str, str], expected: tuple[str, ...]) -> None:
    assert visible(NODE, env) == expected


def test_device_nodes_of_a_container_renumber_what_it_sees() -> None:
    assert visible(NODE, {"CUDA_VISIBLE_DEVICES": "1"}, device_minors={3, 5}) == names(5)
    assert visible(NODE, {}, device_minors={3, 5}) == names(3, 5)


def test_device_nodes_are_found_by_their_numbers(tmp_path: Path) -> None:
    assert device_minors(str(tmp_path)) is None
    for name in ("nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert device_minors(str(tmp_path)) == frozenset({0, 12})


def test_mixed_gpus_need_the_order_or_uuids() -> None:
    mixed = (*NODE[:1], Gpu(U[1], 1, "T400", "00000000:00:00.0", 1))
    with pytest.raises(RequestError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible(mixed, {"CUDA_VISIBLE_DEVICES": "0"})
    assert visible(mixed, {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == (U[1],)
    assert visible(mixed, {"CUDA_VISIBLE_DEVICES": U[0]}) == (U[0],)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"CUDA_VISIBLE_DEVICES": "MIG-0123"}, "belong to the whole GPU"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, "fits 8 GPUs"),
        ({"LOCAL_RANK": "8"}, "LOCAL_RANK=8 but 8 GPUs"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
    ],
)
def test_what_cannot_be_known_is_an_error(env: dict[str, str], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        visible(NODE, env)


ENTRY = st.one_of(st.integers(-1, 9).map(str), st.sampled_from(U), st.sampled_from([u[:9] for u in U]), st.text(max_size=4))


@given(st.lists(ENTRY, max_size=9), st.permutations(range(8)), st.none() | st.sets(st.integers(0, 7), min_size=1))
def test_only_gpus_of_the_node_each_once_and_never_beyond_what_was_given(
    entries: list[str], order: list[int], minors: set[int] | None
) -> None:
    shuffled = tuple(NODE[i] for i in order)
    env = {"CUDA_VISIBLE_DEVICES": ",".join(entries)}
    try:
        shown = visible(shuffled, env, device_minors=minors)
    except RequestError:
        return
    assert len(set(shown)) == len(shown)
    assert set(shown) <= {U[i] for i in (minors if minors is not None else range(8))}
    assert shown == visible(NODE, env, device_minors=minors)  # the order in which a daemon lists GPUs does not matter


@given(st.sets(st.integers(0, 7), min_size=1), st.data())
def test_names_and_numbers_of_the_same_gpus_agree(given_gpus: set[int], data: st.DataObject) -> None:
    listed = sorted(given_gpus)
    positions = data.draw(st.lists(st.integers(0, len(listed) - 1), unique=True))
    uuids = names(*[listed[p] for p in positions])
    if sorted(positions) != listed:  # else the numbers are the node's own
        env = {"NVIDIA_VISIBLE_DEVICES": ",".join(map(str, listed)), "CUDA_VISIBLE_DEVICES": ",".join(map(str, positions))}
        assert visible(NODE, env) == uuids
    assert visible(NODE, {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}) == uuids


def test_people_name_gpus_by_index_uuid_or_prefix() -> None:
    assert pick(NODE, ["1,0", U[3], U[2][:9], "5555a"]) == names(1, 0, 3, 2, 5)
    assert pick(NODE, ["all"]) == names(*range(8))
    with pytest.raises(RequestError, match=r"no GPU '12'.*GPUs here: 0, 1"):
        pick(NODE, [12])

"""The lease file: found again in the same boot, worthless in another, put aside when broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from powerd.api import WantSpec
from powerd.lease import Lease, LeaseEvent, advance
from powerd.leasefile import LeaseFile
from powerd.model import Control


def lease(name: str = "l1") -> Lease:
    return Lease(
        id=name, token_hash="h", uid=7, user="u", pid=None, gpus=("GPU-a",), wants=(WantSpec(Control.SM_CLOCK, 900, 1200),),
        reason="r", ttl_ns=5, created_ns=1, expires_ns=6, min_dwell_ns=3,
    )  # fmt: skip


def test_live_leases_and_panic_come_back_as_they_were(tmp_path: Path) -> None:
    file = LeaseFile(tmp_path / "leases.json", "boot")
    ended = advance(lease("l2"), LeaseEvent.RELEASE, 2)
    file.save([lease(), ended], panic=True)
    saved = LeaseFile(tmp_path / "leases.json", "boot").load()
    assert saved.leases == (lease(),)
    assert saved.panic
    assert (tmp_path / "leases.json").stat().st_mode & 0o777 == 0o600


def test_another_boot_keeps_panic_and_forgets_leases(tmp_path: Path) -> None:
    LeaseFile(tmp_path / "leases.json", "boot").save([lease()], panic=True)
    saved = LeaseFile(tmp_path / "leases.json", "later").load()
    assert saved.leases == ()
    assert saved.panic


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-5], lambda d: b"", lambda d: d.replace(b'"version":1', b'"version":9'), lambda d: b"\xff" * 9]
)
def test_a_broken_file_is_put_aside_and_said(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "leases.json"
    LeaseFile(path, "boot").save([lease()], panic=False)
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    saved = LeaseFile(path, "boot").load()
    assert saved.leases == ()
    assert "put aside" in saved.problem
    assert not path.exists()
    assert path.with_name("leases.json.quarantined").exists()


def test_a_file_that_others_can_write_or_a_link_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    LeaseFile(path, "boot").save([lease()], panic=False)
    path.chmod(0o666)
    assert LeaseFile(path, "boot").load().problem
    target = tmp_path / "elsewhere.json"
    target.write_text(json.dumps({}))
    path.symlink_to(target)
    assert LeaseFile(path, "boot").load().problem
    assert target.exists()


def test_the_token_is_not_in_the_file(tmp_path: Path) -> None:
    from powerd.lease import new_token

    token, hashed = new_token()
    held = Lease(**{f: getattr(lease(), f) for f in Lease.__slots__} | {"token_hash": hashed})
    LeaseFile(tmp_path / "leases.json", "boot").save([held], panic=False)
    assert token not in (tmp_path / "leases.json").read_text()

"""Groups that wait on disk: added in any order, read in that of their ids, gone with the process."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import made_for

from rsrlm.store.groups import GroupSpool, ids_of


@given(names=st.lists(st.text("ab-2ü", min_size=1, max_size=3), unique=True, max_size=8), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_groups_come_back_in_the_order_of_their_ids(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], seed: int
) -> None:
    groups = [made_for(name, responses=number) for number, name in enumerate(names)]
    spool = GroupSpool(tmp_path_factory.mktemp("spool"), [group.id for group in groups])
    for index in random.Random(seed).sample(range(len(groups)), len(groups)):
        assert spool.add(groups[index]) == index
        assert spool[index] == groups[index]
    assert list(spool) == spool[:] == groups
    assert spool[1:] == groups[1:]
    assert len(spool) == len(groups)
    assert list(ids_of(spool)) == list(ids_of(groups))
    if groups:
        assert spool[-1] == groups[-1]
        assert groups[0] in spool


def test_the_first_group_of_an_id_stays(tmp_path: Path) -> None:
    spool = GroupSpool(tmp_path, ["00/tea"])
    assert spool.add(made_for("tea")) == spool.add(made_for("tea", responses=3)) == 0
    assert list(spool) == [made_for("tea")]


def test_groups_that_are_not_there(tmp_path: Path) -> None:
    spool = GroupSpool(tmp_path, ["00/tea", "00/milk"])
    spool.add(made_for("milk"))
    with pytest.raises(KeyError, match="group 00/tea has not been added"):
        spool[0]
    with pytest.raises(KeyError, match="00/other"):
        spool.add(made_for("other"))
    with pytest.raises(IndexError):
        spool[2]
    with pytest.raises(ValueError, match="two groups have one id"):
        GroupSpool(tmp_path, ["00/tea", "00/tea"])


def test_a_full_disk_loses_no_group(tmp_path: Path) -> None:
    spool = GroupSpool(tmp_path, ["00/tea", "00/milk"])
    with pytest.raises(OSError, match="File too large"), small_disk():
        spool.add(made_for("tea", responses=20))
    spool.add(made_for("milk"))
    spool.add(made_for("tea"))
    assert list(spool) == [made_for("tea"), made_for("milk")]


KILLED = """
import os, sys
from pathlib import Path
from samples import made_for
from rsrlm.store.groups import GroupSpool
spool = GroupSpool(Path(sys.argv[1]), ["00/tea"])
spool.add(made_for("tea"))
assert spool[0] == made_for("tea")
os.kill(os.getpid(), 9)
"""


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], cwd=Path(__file__).parent, check=False)
    assert done.returncode == -9
    assert list((tmp_path / "run").iterdir()) == []


GROWING = """
import os, sys
from pathlib import Path
from samples import made_for
from rsrlm.store.groups import GroupSpool

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

ids = [f"00/{number}" for number in range(20_000)]
before = resident()
spool = GroupSpool(Path(sys.argv[1]), ids)
for number in range(20_000):
    spool.add(made_for(str(number), responses=4))
for group in spool:
    pass
print((resident() - before) / 20_000)
"""


def test_memory_does_not_hold_the_groups(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWING, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert float(done.stdout) < 300  # a group of this size takes 10,000 as objects

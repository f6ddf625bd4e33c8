"""Large tensors stand on huge pages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = """
import re
from pathlib import Path
import {command}
import torch
tensor = torch.ones(30_000_000)  # 120 MB
print(int(re.search(r"AnonHugePages:\\s*(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) > 60_000)
"""


@pytest.mark.skipif(not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="the system has no huge pages")
@pytest.mark.parametrize("command, own, told", [("train", None, "True"), ("policy", None, "True"),
                                                ("train", "0", "False")])
def test_large_tensors_stand_on_huge_pages_unless_the_user_says_otherwise(command, own, told, monkeypatch):
    if own is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    elif re.search(r"\[always\]", SETTING.read_text()):
        pytest.skip("the system gives huge pages to whatever is large")
    else:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", own)
    ran = subprocess.run([sys.executable, "-c", HUGE.format(command=command)], cwd=ROOT, text=True, check=True,
                         capture_output=True)
    assert ran.stdout.strip() == told

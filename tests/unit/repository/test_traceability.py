from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ROWS = [line for line in (ROOT / "docs" / "traceability.md").read_text().splitlines() if line.startswith("| ")]
NAMED = sorted(set(re.findall(r"`((?:tests|protos)/[^`]+)`", "\n".join(ROWS))))


@pytest.mark.parametrize("name", NAMED)
def test_what_shows_a_requirement_exists(name):
    path, _, test = name.partition("::")
    source = (ROOT / path).read_text()
    assert not test or re.search(rf"^(async )?def {test}\(", source, re.MULTILINE)


def test_every_row_names_what_shows_it():
    claims = [row for row in ROWS if not row.startswith(("| ---", "| requirement", "| what"))]
    assert len(claims) > 30
    assert all("`tests/" in row.split(" | ")[-1] for row in claims)

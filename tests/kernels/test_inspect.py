"""The reading of SASS listings: arrivals while an ldmatrix may still be reading, addresses with a uniform register."""

from __future__ import annotations

import pytest

from cutedsl_kernels.compile.inspect import early_arrivals, split_addresses

pytestmark = pytest.mark.compile

READ = "LDSM.16.MT88.4 R24, [R4]"
FIRST, SECOND = "HMMA.1688.F32.BF16 R28, R24, R136, R28", "HMMA.1688.F32.BF16 R32, R26.reuse, R136, R32"
ARRIVE = "@!P0 SYNCS.ARRIVE.TRANS64.ART0 RZ, [UR19+0x32950], R8"


def listing(*instructions: str) -> str:
    lines = [f"        /*{16 * i:04x}*/    {text} ;" for i, text in enumerate(instructions)]
    return "\n".join([".text.kernel:", *lines])


@pytest.mark.parametrize(
    ("instructions", "found"),
    [
        ((READ, FIRST, SECOND, ARRIVE), 0),
        ((READ, FIRST, ARRIVE, SECOND), 1),
        ((READ, ARRIVE, FIRST, SECOND, ARRIVE), 1),
        ((READ, READ.replace("R24", "R40"), FIRST, SECOND, ARRIVE), 1),
        ((READ, "HMMA.16816.F32.BF16 R28, R24, R136, R28", ARRIVE), 0),
        ((READ, "HMMA.16816.F32.BF16 R28, R136, R24, R28", ARRIVE), 1),  # as B, two registers of the four
        ((READ.replace(".4", ".2"), "HMMA.16816.F32.BF16 R28, R136, R24, R28", ARRIVE), 0),
        ((ARRIVE,), 0),
    ],
)
def test_early_arrivals(instructions: tuple[str, ...], found: int) -> None:
    assert early_arrivals(listing(*instructions)) == {"kernel": found}


def test_kernels_are_counted_apart() -> None:
    two = listing(READ, ARRIVE) + "\n" + listing(ARRIVE).replace("kernel", "other")
    assert early_arrivals(two) == {"kernel": 1, "other": 0}


def test_split_addresses() -> None:
    copies = (
        "LDGSTS.E.BYPASS.128 [R27+UR0+0x2000], desc[UR1][R22.64+0x80]",
        "@P0 LDGSTS.E.BYPASS.128 [R27+UR6], desc[UR4][R22.64]",
        "LDGSTS.E.BYPASS.128 [R27+0x2000], desc[UR4][R22.64+0x80]",
        "LDS R6, [R2+UR10+0x31b80]",
    )
    assert split_addresses(listing(*copies)) == {"kernel": 2}

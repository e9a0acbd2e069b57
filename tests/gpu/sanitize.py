"""Small layers for compute-sanitizer: only our kernels do work on the GPU, everything else happens on the CPU.

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py --every-lane-arrives

Racecheck follows mbarriers thread by thread: where one lane arrives for a warp after sync_warp it takes the accesses of
the other 31 lanes for races. --every-lane-arrives compiles the same kernels with an arrival of each lane instead.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
from helpers import check_close, random_problem

from cutedsl_kernels import Plan
from cutedsl_kernels.configs import FusedConfig, StagedConfig
from cutedsl_kernels.kernels.row_ring import RowRing
from cutedsl_kernels.launch import sparse_moe_cuda


def main() -> None:
    checked = 0
    for plan in (Plan("fused", FusedConfig()), Plan("staged", StagedConfig())):
        # The last has items enough for neighbours to share theirs (fused).
        for num_tokens, intermediate_size in ((1, 64), (13, 72), (40, 2048)):
            case = random_problem(
                num_tokens,
                num_tokens=num_tokens,
                num_experts=4,
                top_k=2,
                hidden_size=128,
                intermediate_size=intermediate_size,
                sparsity=0.6,
                skip_pairs=0.2,
                invalid_ids=True,
            )
            result = sparse_moe_cuda(**case.to("cuda").arguments, plan=plan)
            torch.cuda.synchronize()
            check_close(result.cpu(), case)
            checked += 1
    print(f"{checked} layers checked")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:  # these kernels are for nobody else
        if "--every-lane-arrives" in sys.argv:
            RowRing.warp_arrivals = 32
            os.environ["CUTEDSL_KERNELS_CACHE_DIR"] = cache
        main()

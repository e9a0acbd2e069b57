"""What a compiled kernel uses: registers, shared memory, threads, and the machine instructions in it. No GPU needed.

Instructions need nvdisasm (``pip install nvidia-cuda-nvdisasm``, part of the extra ``test``).
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from .dsl import compile_listing
from .specs import KernelSpec

REGISTERS_OF_SM = 65536
_REGISTER_COUNT = 0x2F  # EIATTR_REGCOUNT
# The host code fills one cudaLaunchConfig_t per launch: grid, block, dynamic shared memory, stream, attributes.
_CONFIG = "struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>"
_CONSTANT = re.compile(r"(%\d+) = llvm\.mlir\.constant\((-?\d+) : i\d+\)")
_FIELD = re.compile(r"(%\d+) = llvm\.getelementptr (%\d+)\[0, (2|1, 0)\] .*" + re.escape(_CONFIG))
_STORE = re.compile(r"llvm\.store (%\w+), (%\d+) :")
_LAUNCHED = re.compile(r"llvm\.mlir\.addressof @kernels_(\w+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_FRAGMENTS = {"HMMA.16816": (4, 4, 2, 4), "HMMA.1688": (4, 2, 1, 4)}  # registers of an operand: D, A, B, C
_FUNCTION = re.compile(r"^\.text\.(\S+):")


@dataclass(frozen=True)
class KernelFacts:
    """One kernel of a spec. registers: per thread; smem: bytes of a CTA; instructions: SASS mnemonic -> occurrences;
    early_arrivals, split_addresses: see the functions."""

    spec: KernelSpec
    kernel: str
    threads: int
    registers: int
    smem: int
    instructions: Counter[str]
    early_arrivals: int
    split_addresses: int

    @property
    def register_limit(self) -> int:
        """Registers a thread may have for one CTA to fit an SM; they are handed out in eights."""
        return min(255, REGISTERS_OF_SM // self.threads // 8 * 8)

    def count(self, *prefixes: str) -> int:
        """Instructions whose mnemonic starts with one of ``prefixes``, a part of it ending at a dot."""
        return sum(
            n for name, n in self.instructions.items() if f"{name}.".startswith(tuple(f"{p}." for p in prefixes))
        )

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory: spilled registers, or arrays indexed at run time."""
        return self.count("LDL", "STL")


def inspect_kernels(spec: KernelSpec) -> list[KernelFacts]:
    """Compiles ``spec`` (the cache is left alone) and reads its kernels, in the order of their first launch."""
    listing = compile_listing(spec)
    sass = _sass(listing.cubin)
    registers, instructions = _registers(listing.cubin), _instructions(sass)
    early, split = early_arrivals(sass), split_addresses(sass)
    launches = dict(_launches(listing.host))
    if set(launches) != set(registers):
        raise RuntimeError(f"{spec.name}: launched {sorted(launches)}, but the cubin holds {sorted(registers)}")
    return [
        KernelFacts(
            spec,
            _short(spec, name, len(launches)),
            threads,
            registers[name],
            smem,
            instructions[name],
            early[name],
            split[name],
        )
        for name, (threads, smem) in launches.items()
    ]


def inspect_in_parallel(specs: Iterable[KernelSpec], processes: int) -> Iterator[KernelFacts]:
    """inspect_kernels over ``specs`` in as many processes, in the order of the specs."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for facts in pool.map(inspect_kernels, specs):
            yield from facts


def _launches(host: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(kernel, (threads, shared memory)) of every launch in the host code."""
    names = []
    configs: dict[str, dict[str, int]] = {}
    for body in re.split(r"\n  llvm\.func ", host):
        if "llvm.call @_cudaLaunchKernelEx" not in body:
            continue
        constants = {m[1]: int(m[2]) for m in _CONSTANT.finditer(body)}
        fields = {m[1]: (m[2], m[3]) for m in _FIELD.finditer(body)}
        for m in _STORE.finditer(body):
            if m[2] in fields and m[1] in constants:
                config, field = fields[m[2]]
                configs.setdefault(config, {})[field] = constants[m[1]]
        names += _LAUNCHED.findall(body)
    for name, config in zip(names, configs.values(), strict=True):
        yield name, (config["1, 0"], config["2"])


def _registers(cubin: bytes) -> dict[str, int]:
    """Registers per thread of every kernel, from the attributes in .nv.info."""
    sections = _sections(cubin)
    symbols, strings = sections[".symtab"], sections[".strtab"]
    info, found = sections[".nv.info"], {}
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if (form, attribute, size) == (4, _REGISTER_COUNT, 8):
            symbol, registers = struct.unpack_from("<II", info, at + 4)
            (name,) = struct.unpack_from("<I", symbols, 24 * symbol)
            found[strings[name : strings.index(b"\0", name)].decode()] = registers
        at += 4 + (size if form == 4 else 0)
    return found


def _sections(elf: bytes) -> dict[str, bytes]:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    start = headers[names][4]
    found = {}
    for header in headers:
        name = elf[start + header[0] : elf.index(b"\0", start + header[0])].decode()
        found[name] = elf[header[4] : header[4] + header[5]]
    return found


def _sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_disassembler(), "-c", file.name], check=True, capture_output=True, text=True).stdout


def early_arrivals(sass: str) -> dict[str, int]:
    """Arrivals at an mbarrier of each kernel that stand before the first use of a register that an ldmatrix fills.

    Until that use the ldmatrix may still be reading, and what the arrival gives back be overwritten by a bulk copy.
    Follows the order of the listing, so it sees what the assembler moved within straight code.
    """
    found: dict[str, int] = {}
    unused: dict[str, set[int]] = {}
    for kernel, name, operands in _listed(sass):
        pending = unused.setdefault(kernel, set())
        found.setdefault(kernel, 0)
        registers = [[int(n) for n in re.findall(r"\bR(\d+)", operand)] for operand in operands.split(",")]
        if name.startswith("LDSM"):
            first = registers[0][0]
            pending |= set(range(first, first + int(name.rsplit(".", 1)[1])))
        elif name.startswith("SYNCS.ARRIVE"):
            found[kernel] += bool(pending)
        else:
            widths = next((w for start, w in _FRAGMENTS.items() if name.startswith(start)), ())
            for i, numbers in enumerate(registers):
                if i or name.startswith("ST"):  # else what it writes
                    width = widths[i] if i < len(widths) else 1
                    pending -= {n + j for n in numbers for j in range(width)}
    return found


def split_addresses(sass: str) -> Counter[str]:
    """Asynchronous copies of each kernel whose shared address has a uniform register in it.

    With an L2 policy a GPU refuses them (kernels.primitives.in_vector_register).
    """
    return Counter(
        kernel
        for kernel, name, operands in _listed(sass)
        if name.startswith("LDGSTS") and re.search(r"\+UR\d", operands.split(",")[0])
    )


def _instructions(sass: str) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for kernel, name, _ in _listed(sass):
        found.setdefault(kernel, Counter())[name] += 1
    return found


def _listed(sass: str) -> Iterator[tuple[str, str, str]]:
    """(kernel, mnemonic, operands) of every instruction of a listing, in order."""
    kernel = ""
    for line in sass.splitlines():
        if m := _FUNCTION.match(line):
            kernel = m[1]
        elif m := _INSTRUCTION.match(line):
            yield kernel, m[1], line[m.end() :]


@functools.cache
def _disassembler() -> str:
    package = importlib.util.find_spec("nvidia")
    folders = [] if package is None else list(package.submodule_search_locations or [])
    for folder in folders:  # the newest: it has to be at least as new as the assembler in the DSL
        for path in sorted(Path(folder).glob("*/bin/nvdisasm"), reverse=True):
            return str(path)
    if path_of_toolkit := shutil.which("nvdisasm"):
        return path_of_toolkit
    raise FileNotFoundError("nvdisasm is needed to count instructions: pip install nvidia-cuda-nvdisasm")


def _short(spec: KernelSpec, name: str, launches: int) -> str:
    """The DSL's name of a kernel holds module and class: ``..kernelskernelsfused_decodeFusedDecode_object..``."""
    if launches == 1:
        return spec.kernel
    m = re.search(r"kernels([a-z_]+)([A-Z]\w*?)_object", name)
    return f"{spec.kernel}.{m[2]}" if m else name

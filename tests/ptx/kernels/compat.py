"""Names that moved between releases of the CuTe DSL (4.6 to 4.8)."""

try:
    from cutlass.memory import SmemAllocator
except ImportError:  # before 4.7
    from cutlass.utils import SmemAllocator
try:
    from cutlass.tensor_utils import LayoutEnum
except ImportError:
    from cutlass.utils import LayoutEnum

__all__ = ["LayoutEnum", "SmemAllocator"]

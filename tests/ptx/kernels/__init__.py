"""Small CuTe DSL kernels that exercise the interpreter. They are written to be short, not fast."""

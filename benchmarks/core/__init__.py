"""What all benchmarks share: workloads and operands, timing, the rates of the machine, rows and files."""

"""The operators: a file each, with its workloads and peers."""

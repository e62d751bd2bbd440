"""Which plan the policy is served by: the compiled one, a CUDA device, or the eager one."""

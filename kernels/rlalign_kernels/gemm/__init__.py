"""``linear`` on GPUs: plan, schedules, and kernels, which are imported only where backend="triton" is asked for."""

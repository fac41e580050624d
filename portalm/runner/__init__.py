"""From a step plan to drawn ids: buffers, the captured step, sampling parameters."""

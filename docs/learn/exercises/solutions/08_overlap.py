"""The host waits for what it reads, the device for what it is given."""


def ends(plan_ms: float, device_ms: float, num_steps: int, ahead: bool) -> list[float]:
    """When each step's tokens were read."""
    read: list[float] = []
    host = device = 0.0  # when each of them is free
    for step in range(num_steps):
        oldest = step - 2 if ahead else step - 1  # must have been read before this one is planned
        begin = max(host, read[oldest]) if oldest >= 0 else host
        host = begin + plan_ms
        device = max(device, host) + device_ms
        read.append(device)
    return read

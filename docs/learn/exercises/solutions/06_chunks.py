"""Nobody who is being read to waits for somebody's prompt: what decodes leave of the step is the prompts'."""


def plan(num_decodes: int, prompts_left: list[int], budget: int) -> list[int]:
    """Tokens of each prompt in this step."""
    room, chunks = budget - num_decodes, []
    for left in prompts_left:
        chunks.append(min(left, room))
        room -= chunks[-1]
    return chunks

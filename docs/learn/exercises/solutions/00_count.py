"""The last token is sampled and never computed: nobody asks what follows it."""


def computed(num_prompt: int, num_output: int, keeps_cache: bool) -> int:
    """Tokens that pass through the model."""
    if keeps_cache:
        return num_prompt + num_output - 1
    return num_output * num_prompt + num_output * (num_output - 1) // 2

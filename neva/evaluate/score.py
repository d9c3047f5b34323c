"""How an answer is compared with the truth."""


def exact_match(answer: str, truth: str) -> bool:
    """Equal, but for white space at the ends."""
    return answer.strip() == truth.strip()

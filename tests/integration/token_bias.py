"""Which tokens a random model is to write more often."""

from tokenizers import Tokenizer


def logit_bias(model, wanted):
    """The field of a request that gives tokens these biases, by their text; no token: left out."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = {tokenizer.token_to_id(text): value for text, value in wanted.items()}
    return {str(id): value for id, value in ids.items() if id is not None}

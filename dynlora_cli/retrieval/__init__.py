"""Finding texts by what they mean or by their words: encoders that make vectors of texts, and lexical scores."""

"""Between text and tokens: tokenizers, streaming detokenization, stop strings, chat templates. Never imports torch."""

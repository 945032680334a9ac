"""What is in a GGUF checkpoint: metadata, tensors, and the config and tokenizer they describe."""

"""Who computes: operators of torch (`schemas`) and their kernels, a module per device."""

from transformers_kt.backends import cpu as cpu  # registers its kernels: an operator never stands without them

"""From a checkpoint to a bundle: load, trace, verify, publish. Each word is one module, or one function of it."""

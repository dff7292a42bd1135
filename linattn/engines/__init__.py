"""How tokens mix: one file an engine, with the derivation of its VJP."""

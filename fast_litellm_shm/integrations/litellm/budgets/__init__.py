"""LiteLLM's budgets, kept over all workers of the host: which of them a request counts for
(:mod:`.found`), in which windows (:mod:`.windows`), what is reserved and spent (:mod:`.spending`),
what sessions of agents use (:mod:`.sessions`), and what stands in the place of LiteLLM's own
counting in each worker (:mod:`.replacement`)."""

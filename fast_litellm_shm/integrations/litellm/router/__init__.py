"""What workers share of a ``litellm.Router``'s state, for its own routing strategies."""

"""From recipes to typed options: YAML files, config dataclasses, and checks of their values."""

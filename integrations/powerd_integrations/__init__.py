"""Everything that plugs powerd into something else; frameworks are imported lazily."""

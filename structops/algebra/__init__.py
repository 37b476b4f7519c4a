"""Verbs on operators, one file each: what the verb means, its fallback, and the laws on CoLA's wrappers."""

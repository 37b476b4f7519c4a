"""The experiments of the paper as commands: models, data, trainings, tables and plots."""

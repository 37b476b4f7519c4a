"""What every study of trainings is made of, and nothing of what a study is about.

- `config`: settings as a dataclass, as YAML and as options of the command line.
- `store`: results as JSON lines, whole after any end.
- `pool`: many trainings at once, in processes of this machine or on a cluster that Ray manages.
- `checkpoint`: a training that goes on where it was stopped.
- `frontier`: error against a cost, its power law, and what one structure saves beside another.
- `figures`, `tables`, `page`: what a study leaves for people.
"""

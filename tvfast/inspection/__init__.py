"""What `tvfast inspect` and the report of a merge show: figures of task vectors, and pages of them."""

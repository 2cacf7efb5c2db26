"""The main job on data that ships in a package: fine-tune on three tasks, merge the experts, compare."""

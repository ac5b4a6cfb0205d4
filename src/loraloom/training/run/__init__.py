"""The loop around it: jobs, their order, files, evaluations, faults and snapshots."""

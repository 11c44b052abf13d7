"""The Dagster layer: jobs, ops, schedules and the resource through which they do a workflow's steps."""

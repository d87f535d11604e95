"""What a job will need and do on a TPU slice, found by compiling it for that slice on a machine without TPUs."""

"""What happened: metrics read from StepRecords and nothing else."""

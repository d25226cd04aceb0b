"""What a run records in other programs' formats: MLPerf's log, TensorBoard's event files."""

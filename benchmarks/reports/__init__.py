"""What results files come to: comparison, targets, pictures."""

"""Results -> rows -> fragments -> parts and receipts in the output."""

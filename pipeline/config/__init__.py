"""Job configurations, one file a job, and the command line made from them."""

from mergeready.cli import main

main()

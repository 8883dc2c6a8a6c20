from tests.sim.runner import main
main()

// Catch2 2 is a header: its main function is compiled here, once.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>

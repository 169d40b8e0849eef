//! Programs and upstreams in every order: what arrives, how it ends, what is left.

use proptest::prelude::*;

use crate::testing::world;

/// So many cases, unless `PROPTEST_CASES` says otherwise.
pub(super) fn cases(cases: u32) -> ProptestConfig {
    let said = std::env::var_os("PROPTEST_CASES").is_some();
    let default = ProptestConfig::default();
    if said { default } else { ProptestConfig { cases, ..default } }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn whatever_the_order_the_bytes_arrive_and_every_flow_ends(script in proptest::collection::vec(any::<u8>(), 1..1500)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let result = runtime.block_on(world::run(&script, "models"));
        prop_assert!(result.is_ok(), "{}", result.unwrap_err());
    }
}

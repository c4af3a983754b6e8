/// cppvmm.vcpu_group: threads of vCPUs, started, stopped and awaited. The one module whose users need Boost (Asio).
///
///     auto group = cppvmm::VcpuGroup::start(std::move(vcpus), on_exit, io_context.get_executor());
///     group->async_wait([](cppvmm::VcpuEnds ends) { ... });
///     signals.async_wait([&](auto...) { group->stop(); });
///     io_context.run();
///
/// Include <boost/asio/any_io_executor.hpp>, or all of <boost/asio.hpp>, before the import: from the import alone clang
/// 19 leaves out friend functions of Asio's execution properties, and the program does not link.
export module cppvmm.vcpu_group;
export import :group;

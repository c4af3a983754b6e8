/// cppvmm.vcpu_group: threads of vCPUs, started, stopped and awaited. The one module whose users need Boost (Asio).
///
///     auto group = cppvmm::VcpuGroup::start(std::move(vcpus), on_exit, io_context.get_executor());
///     group->async_wait([](cppvmm::VcpuEnds ends) { ... });
///     signals.async_wait([&](auto...) { group->stop(); });
///     io_context.run();
export module cppvmm.vcpu_group;
export import :group;
